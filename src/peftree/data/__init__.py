"""Data of a user: rows of files, images, fewer rows; read and checked before any work."""
