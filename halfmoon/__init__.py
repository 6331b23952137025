"""Halfmoon: the ground floor: what a client imports (vocabulary, wire stubs, SDK)."""
