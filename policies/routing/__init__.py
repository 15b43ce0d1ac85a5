"""What the routers of a policy choose: its experts, and its attention heads where these are dynamic."""
