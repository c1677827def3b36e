"""What people read: comparison tables and figures, made from run folders alone."""
