"""Pages of answers, with the pictures that they are about: one file, or a server on this machine."""
