"""The shapes of OpenAI's API: bodies in, chunks and whole answers out."""
