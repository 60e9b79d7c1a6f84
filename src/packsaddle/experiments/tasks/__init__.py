"""Data and networks of the experiments: images, text, their split over workers, models, batch normalisation."""
