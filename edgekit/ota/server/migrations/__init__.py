"""How a database of a fleet came to be what it is: one revision a file, each applied once, in order, in place.

A revision that was released is never changed; `tables` says what they add up to, which a test compares.
"""
