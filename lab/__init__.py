"""All that is run to find out whether packsaddle is true: it needs a clone, and is in no wheel."""
