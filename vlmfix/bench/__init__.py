"""What decoders cost: models of true shapes, measured in turns, beside stock transformers and the released way."""
