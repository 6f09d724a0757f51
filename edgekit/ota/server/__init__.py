"""The fleet's half: signs releases, hands out bytes, decides who is next. Runs no model."""
