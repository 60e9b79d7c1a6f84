"""The race: a benchmark of packsaddle and torch's own methods, trained side by side in one run. Read `race` first."""
