"""One dense forward a method, written from its paper's equation: what the library's own forward is held to."""
