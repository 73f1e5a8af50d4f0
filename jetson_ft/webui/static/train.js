// The Train tab.
