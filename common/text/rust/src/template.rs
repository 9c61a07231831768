//! A chat template (Jinja), rendered as transformers' apply_chat_template() does: the same whitespace
//! rules, filters, functions and Python methods of values.

use std::borrow::Cow;
use std::collections::BTreeMap;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;
use regex::Regex;

use crate::python_json;

/// A template is code from a model folder, so its work is bounded: about this many instructions, and
/// 64 bytes of text made for each. Templates of today use under 200 a message and make about five
/// copies of its text; 2^22 take half a second, and allow 256 MiB. What is not bounded is the engine's
/// work on lists that a template nests in itself over and over; no template has a use for that.
const FUEL: u64 = 1 << 22;
/// The compiler recurses once for each operator of a chain like 1+1+1: at worst, a sign per byte of
/// source, 70 MB of stack for the 128 KiB that the C++ side lets through. Only what is used is taken.
const COMPILER_STACK_BYTES: usize = 256 << 20;
/// In a format string, digits of a width or precision.
const MAX_WIDTH_DIGITS: usize = 4;
const NAME: &str = "chat template";

pub struct ChatTemplate {
    environment: Environment<'static>,
}

impl ChatTemplate {
    pub fn new(source: &str) -> Result<ChatTemplate, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| error.to_string())?;
        environment.set_syntax(syntax);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(call_method);
        environment.add_filter("tojson", python_json::to_json);
        environment.add_filter("trim", trim);
        environment.add_function("raise_exception", raise_exception);
        let source = without_generation_tags(source)?;
        let compile = move || {
            let added = environment.add_template_owned(NAME, source);
            added.map(|()| environment).map_err(|error| describe(&error))
        };
        let environment = std::thread::Builder::new()
            .stack_size(COMPILER_STACK_BYTES)
            .spawn(compile)
            .map_err(|error| format!("a thread to compile the chat template: {error}"))?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(ChatTemplate { environment })
    }

    /// `context` is a JSON object of the template's variables; strftime_now() formats
    /// `now_unix_seconds` in the machine's time zone.
    pub fn render(&self, context: &str, now_unix_seconds: i64) -> Result<Vec<u8>, String> {
        let mut variables: BTreeMap<String, Value> =
            serde_json::from_str(context).map_err(|error| format!("context: {error}"))?;
        let now = Value::from_function(move |format: String| strftime(&format, now_unix_seconds));
        variables.insert("strftime_now".to_string(), now);
        let template = self.environment.get_template(NAME).map_err(|error| describe(&error))?;
        template
            .render(Value::from_pairs(variables))
            .map(String::into_bytes)
            .map_err(|error| describe(&error))
    }
}

/// The tags {% generation %} and {% endgeneration %}, with which transformers finds the assistant's
/// text in training data, stand for a block with a scope of its own.
fn without_generation_tags(source: &str) -> Result<String, String> {
    let tag =
        Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").map_err(|e| e.to_string())?;
    Ok(tag
        .replace_all(source, |found: &regex::Captures| {
            let keyword = if found.get(2).is_some() { "endwith" } else { "with" };
            format!("{{%{} {} {}%}}", &found[1], keyword, &found[3])
        })
        .into_owned())
}

/// The error and its causes on one line. What the template itself raised stands alone: it is about
/// the messages, not about the template.
fn describe(error: &Error) -> String {
    let mut source: Option<&dyn std::error::Error> = Some(error);
    let mut texts = Vec::new();
    while let Some(cause) = source {
        if let Some(raised) = cause.downcast_ref::<Raised>() {
            return raised.0.clone();
        }
        texts.push(cause.to_string());
        source = cause.source();
    }
    texts.join(": ")
}

/// What raise_exception() said.
#[derive(Debug)]
struct Raised(String);

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
}

fn strftime(format: &str, now_unix_seconds: i64) -> Result<String, Error> {
    let wrong = |text| Error::new(ErrorKind::InvalidOperation, text);
    // The space makes a result that is empty differ from one that did not fit.
    let format = std::ffi::CString::new(format!("{format} "))
        .map_err(|_| wrong("strftime_now: a zero byte in the format"))?;
    let mut text = [0u8; 1024];
    // SAFETY: both calls write only into what is passed here, of the size that is passed.
    let size = unsafe {
        let mut time: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&now_unix_seconds, &mut time).is_null() {
            return Err(wrong("strftime_now: the time is out of range"));
        }
        libc::strftime(text.as_mut_ptr().cast(), text.len(), format.as_ptr(), &time)
    };
    if size == 0 {
        return Err(wrong("strftime_now: the result is longer than 1023 bytes"));
    }
    String::from_utf8(text[..size - 1].to_vec())
        .map_err(|_| wrong("strftime_now: the result is not UTF-8"))
}

/// What str.strip() and str.split() take for white space: Unicode's, and the separators U+001C to
/// U+001F.
fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn trim(text: Cow<'_, str>, chars: Option<Cow<'_, str>>) -> String {
    match chars {
        Some(chars) => text.trim_matches(|c| chars.contains(c)).to_string(),
        None => text.trim_matches(is_python_space).to_string(),
    }
}

/// Methods of Python's values: minijinja-contrib's, and the string methods it lacks or has otherwise.
fn call_method(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        check_cost(state, text, method, args)?;
        if args.is_empty() {
            if let Some(result) = call_method_about_space(text, method) {
                return Ok(result);
            }
        }
        if let [argument, ..] = args {
            if let Some(result) = call_string_method(text, method, argument, &args[1..]) {
                return Ok(result);
            }
        }
    }
    pycompat::unknown_method_callback(state, value, method, args)
}

/// The engine charges for what a method returned; these can take far more memory than their text has
/// before they return.
fn check_cost(state: &State, text: &str, method: &str, args: &[Value]) -> Result<(), Error> {
    match (method, args.first().and_then(Value::as_str)) {
        ("split" | "rsplit", Some(separator)) if !separator.is_empty() => {
            state.consume_fuel(text.matches(separator).count() as u64)
        }
        ("split" | "rsplit" | "splitlines", _) => {
            state.consume_fuel(text.chars().filter(|c| is_python_space(*c)).count() as u64)
        }
        ("format", _) => {
            let too_wide = |part: &str| part.len() > MAX_WIDTH_DIGITS;
            if text.split(|c: char| !c.is_ascii_digit()).any(too_wide) {
                return Err(Error::new(ErrorKind::InvalidOperation, "format: too wide"));
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

fn call_method_about_space(text: &str, method: &str) -> Option<Value> {
    match method {
        "strip" => Some(text.trim_matches(is_python_space).into()),
        "lstrip" => Some(text.trim_start_matches(is_python_space).into()),
        "rstrip" => Some(text.trim_end_matches(is_python_space).into()),
        "split" => {
            Some(Value::from_iter(text.split(is_python_space).filter(|part| !part.is_empty())))
        }
        _ => None,
    }
}

fn call_string_method(text: &str, method: &str, argument: &Value, more: &[Value]) -> Option<Value> {
    let argument = argument.as_str()?;
    let list = |parts: &[&str]| Value::from_iter(parts.iter().copied());
    match (method, more) {
        ("removeprefix", []) => Some(text.strip_prefix(argument).unwrap_or(text).into()),
        ("removesuffix", []) => Some(text.strip_suffix(argument).unwrap_or(text).into()),
        ("partition", []) if !argument.is_empty() => Some(match text.split_once(argument) {
            Some((before, after)) => list(&[before, argument, after]),
            None => list(&[text, "", ""]),
        }),
        ("rpartition", []) if !argument.is_empty() => Some(match text.rsplit_once(argument) {
            Some((before, after)) => list(&[before, argument, after]),
            None => list(&["", "", text]),
        }),
        ("rsplit", []) if !argument.is_empty() => {
            Some(list(&text.split(argument).collect::<Vec<_>>()))
        }
        ("rsplit", [limit]) if !argument.is_empty() => {
            let parts =
                usize::try_from(limit.as_i64()?).map_or(usize::MAX, |n| n.saturating_add(1));
            let mut parts: Vec<&str> = text.rsplitn(parts, argument).collect();
            parts.reverse();
            Some(list(&parts))
        }
        _ => None,
    }
}
