"""From source records to batches."""
