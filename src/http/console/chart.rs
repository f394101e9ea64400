//! A small chart as SVG: one line, its greatest value, and its value now.
//!
//! Drawn by the server, so that it is there without JavaScript. Its looks are in `console.css`: the page's policy allows no style beside it.

use std::fmt::Write as _;

use crate::api::Unit;

const WIDTH: f64 = 240.0;
const HEIGHT: f64 = 48.0;
/// Points of a whole line; a younger one begins further right.
const POINTS: usize = 150;

/// `values`, oldest first; where one is missing the line has a gap.
pub fn chart(name: &str, unit: Unit, values: &[Option<f64>]) -> String {
    let most = values.iter().flatten().copied().fold(0.0, f64::max);
    let top = if most > 0.0 { most * 1.1 } else { 1.0 };
    let begin = POINTS.saturating_sub(values.len());
    let (mut path, mut pen_up) = (String::new(), true);
    for (at, value) in values.iter().enumerate() {
        let Some(value) = value else {
            pen_up = true;
            continue;
        };
        let x = (begin + at) as f64 * WIDTH / (POINTS - 1) as f64;
        let y = HEIGHT - value / top * HEIGHT;
        let _ = write!(path, "{}{x:.1} {y:.1}", if pen_up { 'M' } else { 'L' });
        pen_up = false;
    }
    let now = values.last().copied().flatten().map_or_else(|| "-".to_owned(), |value| text(unit, value));
    let most = text(unit, most);
    format!(
        "<figure><figcaption>{name} <b>{now}</b></figcaption><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" preserveAspectRatio=none role=img \
         aria-label=\"{name}, now {now}, at most {most} in five minutes\"><path d=\"{path}\"/></svg><small>at most {most}</small></figure>"
    )
}

fn text(unit: Unit, value: f64) -> String {
    let digits = usize::from(value < 10.0 && value > 0.0);
    match unit {
        Unit::PerSecond => format!("{value:.digits$}/s"),
        Unit::Millis => format!("{value:.digits$} ms"),
        Unit::Count => format!("{value:.0}"),
        Unit::Mib if value >= 10_240.0 => format!("{:.1} GiB", value / 1024.0),
        Unit::Mib => format!("{value:.digits$} MiB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_ends_at_the_right_and_has_gaps() {
        let svg = chart("writes", Unit::PerSecond, &[Some(5.0), None, Some(10.0), Some(0.0)]);
        assert!(svg.contains("M235.2 26.2M238.4 4.4L240.0 48.0"), "{svg}");
        assert!(svg.contains("<b>0/s</b>") && svg.contains("at most 10/s"), "{svg}");
        let empty = chart("writes", Unit::Millis, &[]);
        assert!(empty.contains("d=\"\"") && empty.contains("<b>-</b>"), "{empty}");
        assert_eq!(text(Unit::Mib, 20480.0), "20.0 GiB");
        assert_eq!((text(Unit::Millis, 1.26), text(Unit::Millis, 126.0)), ("1.3 ms".into(), "126 ms".into()));
    }
}
