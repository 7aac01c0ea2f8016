"""A server that speaks the chat-completions protocol of OpenAI, with a decoder for each request."""
