// The Train tab.
import "./train_form.js";
