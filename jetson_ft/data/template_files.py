"""Chat templates by the name that a recipe gives: shipped ones, and files."""

from __future__ import annotations

from jetson_ft.data import render_template
from jetson_ft.data.render_template import Request, TemplateError
from jetson_ft.data.templates import TEMPLATES
from jetson_ft.errors import UserError, _
from jetson_ft.files import disk_errors, expand_user, refuse_special

_file_names: dict[str, str] = {}  # by the text of each template that was read from a file


def read_template(name: str) -> str:
    """Return the shipped template of that name, or the text of a file.

    Raises:
        UserError: there is neither, or the file is empty, too long, not UTF-8, not valid Jinja or
            without the conversation, or passes a bound for a single question.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = expand_user(name)
    refuse_special(path)
    fix = _("`data.chat_template` takes a file with Jinja text, or one of {names}.")
    names = ", ".join(TEMPLATES)
    if not path.is_file():
        raise UserError(_("Chat template not found."), name, fix, names=names)
    with disk_errors(path), open(path, "rb") as file:
        content = file.read(render_template.MAX_TEMPLATE_BYTES + 1)
    render_template.check_size(len(content), name)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            _("The chat template is not UTF-8 text."), name, fix, names=names
        ) from error
    if not text.strip():
        raise UserError(_("The chat template is empty."), name, fix, names=names)
    if "messages" not in text:  # another file, whose text no error may show
        raise UserError(
            _("This is no chat template: it has no `messages`."), name, fix, names=names
        )
    question = [{"role": "user", "content": "a"}]
    request = Request(text, question, [(1, False)], None, {}, name)
    ((answer,),) = render_template.render([request])
    # It may need other messages: rows that it refuses are reported.
    if isinstance(answer, TemplateError) and answer.line:
        what = _("The chat template is not valid Jinja: line {line}: {error}")
        raise UserError(what, name, line=answer.line, error=str(answer)) from answer
    _file_names[text] = name
    return text


def origin(template: str, folder: str) -> str:
    """Return the file that a tokenizer's template was read from, else the tokenizer's folder."""
    return _file_names.get(template, folder)
