"""The paper, table by table: its figures, what repeating them costs, and miniatures of them."""
