//! One line on the guest's console, for what no caller can be told.

/// Writes a line to standard error, which is the console for PID 1. A console that fails is nobody's problem.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        let line = format!("nacelle-agent: {}\n", format_args!($($arg)*));
        // One write a line, so that lines of several processes do not mix.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }};
}

/// An error and its causes in one line; a cause that only repeats what was said is left out.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let line = error.to_string();
        if !text.ends_with(&line) {
            text.push_str(": ");
            text.push_str(&line);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn causes_are_said_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("open file")]
        struct Outer(#[source] std::io::Error);
        #[derive(Debug, thiserror::Error)]
        #[error(transparent)]
        struct Wrap(Outer);
        let error = Wrap(Outer(std::io::Error::other("no luck")));
        assert_eq!(super::chain(&error), "open file: no luck");
    }
}
