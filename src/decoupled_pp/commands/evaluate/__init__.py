"""`dpp evaluate`: scores the exits of a finished run."""
