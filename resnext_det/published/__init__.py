"""What others published for the same networks, as data."""
