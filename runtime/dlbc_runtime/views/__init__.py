"""How an explanation looks: on the terminal, as an HTML page, as a picture. Imported only when asked for."""
