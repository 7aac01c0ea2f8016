"""What trains the embedded models, studies decoders on them and draws the sprites; beside the package, not in it."""
