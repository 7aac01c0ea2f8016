"""Model families: where attention lives and which input token shows which part of which picture."""
