"""`dpp evaluate`: scores, costs and gradients of the exits of a finished run."""
