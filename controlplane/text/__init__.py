"""Text: tokenizing prompts, chat templates, text from tokens, stop strings. Knows no request and no gRPC."""
