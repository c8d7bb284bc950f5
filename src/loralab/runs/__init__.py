"""What each verb does: the rooms put together. One verb a module, its name the module's."""
