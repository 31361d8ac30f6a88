"""Passes the messages of a pilot of lwfedssl_jax on."""
