"""The wire contract as both sides need it: framing and vocabulary.

Lies below the client and the daemon alike and imports nothing but the standard library.
"""
