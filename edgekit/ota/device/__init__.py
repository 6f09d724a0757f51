"""The device's half: trusts nothing it did not verify, and always has a bundle that serves. Knows no engine."""
