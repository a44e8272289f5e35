"""Other LRP libraries as oracles. They are imported inside functions only, so that tests can be skipped."""
