"""Jobs ask a model many questions, write every answer as it is done, and go on where they were after any kill."""
