"""Images, which client owns them, and their random views."""
