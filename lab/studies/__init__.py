"""Scripts that make the rows and figures of experiments/, one study each."""
