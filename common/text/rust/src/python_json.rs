//! The filter tojson as Python's json.dumps() writes it, which is what templates are tuned to:
//! ", " and ": " between, letters beyond ASCII and HTML's characters as they are, 1.0 not 1.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

/// Python stops near 1,000; a value that deep comes only from a template that builds it.
const MAX_DEPTH: usize = 256;

pub fn to_json(state: &State, value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent = indent_of(options.get("indent")?)?;
    let separators = separators_of(options.get("separators")?, indent.is_some())?;
    let mut writer = Writer {
        state,
        out: String::new(),
        charged: 0,
        indent,
        item_separator: separators.0,
        key_separator: separators.1,
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    writer.write(value, 0)?;
    Ok(Value::from(writer.out))
}

fn wrong(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("tojson: {}", text.into()))
}

/// What one level of indentation is; none means all on one line.
fn indent_of(indent: Option<Value>) -> Result<Option<String>, Error> {
    let Some(indent) = indent.filter(|indent| !indent.is_none()) else {
        return Ok(None);
    };
    if let Some(text) = indent.as_str() {
        return Ok(Some(text.to_string()));
    }
    match i64::try_from(indent) {
        Ok(width) if width <= 64 => Ok(Some(" ".repeat(width.max(0) as usize))),
        _ => Err(wrong("indent is a text or a number up to 64")),
    }
}

fn separators_of(separators: Option<Value>, indented: bool) -> Result<(String, String), Error> {
    let Some(separators) = separators.filter(|separators| !separators.is_none()) else {
        let item = if indented { "," } else { ", " };
        return Ok((item.to_string(), ": ".to_string()));
    };
    let texts: Vec<Value> = separators.try_iter()?.collect();
    match texts.as_slice() {
        [item, key] => match (item.as_str(), key.as_str()) {
            (Some(item), Some(key)) => Ok((item.to_string(), key.to_string())),
            _ => Err(wrong("separators are two texts")),
        },
        _ => Err(wrong("separators are two texts")),
    }
}

struct Writer<'a> {
    state: &'a State<'a, 'a>,
    out: String,
    charged: usize,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl Writer<'_> {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(wrong(format!("nested deeper than {MAX_DEPTH}")));
        }
        // A value that holds another many times over is small, its text is not: paid as it grows.
        if self.out.len() - self.charged >= 64 {
            self.state.consume_fuel(((self.out.len() - self.charged) / 64) as u64)?;
            self.charged = self.out.len();
        }
        self.state.consume_fuel(1)?;
        match value.kind() {
            ValueKind::String => self.write_text(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.write_sequence(value, depth)?,
            ValueKind::Map => self.write_map(value, depth)?,
            _ => {
                let text = scalar(value)?;
                self.out.push_str(&text);
            }
        }
        Ok(())
    }

    fn write_sequence(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.out.push('[');
        let mut empty = true;
        for item in value.try_iter()? {
            self.separate(empty, depth + 1);
            empty = false;
            self.write(&item, depth + 1)?;
        }
        self.close(']', empty, depth);
        Ok(())
    }

    fn write_map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        if self.sort_keys {
            keys.sort();
        }
        self.out.push('{');
        for (index, key) in keys.iter().enumerate() {
            self.separate(index == 0, depth + 1);
            match key.as_str() {
                Some(text) => self.write_text(text),
                None => {
                    let text = scalar(key)?;
                    self.write_text(&text);
                }
            }
            let separator = self.key_separator.clone();
            self.out.push_str(&separator);
            self.write(&value.get_item(key)?, depth + 1)?;
        }
        self.close('}', keys.is_empty(), depth);
        Ok(())
    }

    fn separate(&mut self, first: bool, depth: usize) {
        if !first {
            self.out.push_str(&self.item_separator);
        }
        self.new_line(depth);
    }

    fn close(&mut self, bracket: char, empty: bool, depth: usize) {
        if !empty {
            self.new_line(depth);
        }
        self.out.push(bracket);
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(indent);
            }
        }
    }

    fn write_text(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

fn scalar(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::None => Ok("null".to_string()),
        ValueKind::Bool => Ok(if value.is_true() { "true" } else { "false" }.to_string()),
        ValueKind::Number if value.is_integer() => Ok(value.to_string()),
        ValueKind::Number => Ok(float_text(f64::try_from(value.clone())?)),
        kind => Err(wrong(format!("{kind} is not JSON serializable"))),
    }
}

/// Python's repr() of a float: the shortest digits that read back as the same number, with an
/// exponent below 1e-4 and from 1e16 on.
fn float_text(number: f64) -> String {
    if number.is_nan() {
        return "NaN".to_string();
    }
    if number.is_infinite() {
        return if number > 0.0 { "Infinity" } else { "-Infinity" }.to_string();
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if number != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = format!("{number}");
    if plain.contains('.') {
        plain
    } else {
        plain + ".0"
    }
}
