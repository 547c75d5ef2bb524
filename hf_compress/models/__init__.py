AUTO_CLASSES: dict = {}
