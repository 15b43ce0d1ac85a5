"""What goes with what, and what is refused before anything is loaded."""
