"""How a decoder's parameters are declared, checked and written, and the recipes that hold them."""
