"""The network: template, blocks, backbone, and its cost."""
