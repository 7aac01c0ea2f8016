"""Which decoder to take, and why: from what was measured here, and, marked as such, from what others published."""
