"""What the network is: the template, the backbone, its pyramids."""
