// The Train tab.
import "./train_form.js";
import "./train_side.js";
