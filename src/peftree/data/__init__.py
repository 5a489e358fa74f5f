"""The user's data: rows of files, images, fewer rows; read and checked before any work."""
