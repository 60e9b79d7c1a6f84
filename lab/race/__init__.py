"""The race: packsaddle and its peers, trained side by side in one run. Read `race` first."""
