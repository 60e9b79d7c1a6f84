"""Training runs, benchmarks and studies that test packsaddle's claims. They need a clone, and are not in the wheel."""
