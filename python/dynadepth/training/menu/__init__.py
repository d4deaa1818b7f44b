"""How a menu's plans are chosen and its heads trained; arrays in, a menu out."""
