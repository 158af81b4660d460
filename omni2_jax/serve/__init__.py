"""A server to talk to: OpenAI's Realtime API and chat completions over one engine."""
