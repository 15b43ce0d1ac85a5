"""The policy for other programs: completions over HTTP in OpenAI's form (`quartet serve`)."""
