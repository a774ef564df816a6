"""Pure terms that two or more objectives share."""
