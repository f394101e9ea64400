//! Plots as SVG: bars for works, lines for what grows.
//!
//! The y axis begins at zero; whiskers reach over all rounds. Absent: everything that a general plotting library has beyond that.

use std::fmt::Write as _;

use crate::figures::{Figures, Spread, number};

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 42.0;
const COLOURS: [&str; 3] = ["#1f6feb", "#d9822b", "#6e7781"];

/// A figure at each of some places along the x axis, for each server.
pub struct Plot<'a> {
    pub title: &'a str,
    pub lines: bool,
    /// Label, and each server's figure.
    places: Vec<(String, Vec<Option<Spread>>)>,
    servers: Vec<&'a str>,
}

impl<'a> Plot<'a> {
    /// `places`: label, work and case.
    pub fn new(
        figures: &'a Figures,
        title: &'a str,
        lines: bool,
        metric: &str,
        places: &[(String, &str, &str)],
    ) -> Self {
        let servers = figures.servers();
        let spreads = |work: &str, case: &str| servers.iter().map(|s| figures.spread(work, case, s, metric)).collect();
        let places = places.iter().map(|(label, work, case)| (label.clone(), spreads(work, case))).collect();
        Self { title, lines, places, servers }
    }

    /// `None` without a figure.
    pub fn svg(&self) -> Option<String> {
        let top = self.places.iter().flat_map(|(_, s)| s).flatten().map(|spread| spread.most).reduce(f64::max)?;
        let step = nice_step(top / 4.0);
        let top = (top / step).ceil() * step;
        let y = |value: f64| HEIGHT - BOTTOM - value / top * (HEIGHT - BOTTOM - TOP);
        let slot = (WIDTH - LEFT - RIGHT) / self.places.len() as f64;
        let middle = |place: usize| LEFT + slot * (place as f64 + 0.5);
        let mut svg = format!(
            "<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{HEIGHT}' font-family='sans-serif' font-size='12'>\n\
             <rect width='100%' height='100%' fill='#fff'/>\n{}",
            text(LEFT, 16.0, "start", self.title)
        );
        for line in 0..=(top / step).round() as usize {
            let value = line as f64 * step;
            let at = y(value);
            let _ = writeln!(svg, "<path d='M{LEFT} {at:.1}H{}' stroke='#ddd'/>", WIDTH - RIGHT);
            svg += &text(LEFT - 6.0, at + 4.0, "end", &number(value));
        }
        for (place, (label, _)) in self.places.iter().enumerate() {
            let words: Vec<&str> = label.split('\n').collect();
            for (line, word) in words.iter().enumerate() {
                svg += &text(middle(place), HEIGHT - BOTTOM + 16.0 + 14.0 * line as f64, "middle", word);
            }
        }
        for (server, name) in self.servers.iter().enumerate() {
            let colour = COLOURS[server % COLOURS.len()];
            let x = LEFT + 110.0 * server as f64;
            let _ = writeln!(svg, "<rect x='{x}' y='24' width='10' height='10' fill='{colour}'/>");
            svg += &text(x + 14.0, 33.0, "start", name);
            svg += &self.series(server, colour, slot, middle, y);
        }
        Some(svg + "</svg>\n")
    }

    fn series(
        &self,
        server: usize,
        colour: &str,
        slot: f64,
        middle: impl Fn(usize) -> f64,
        y: impl Fn(f64) -> f64,
    ) -> String {
        let mut svg = String::new();
        let width = slot * 0.7 / self.servers.len() as f64;
        let mut before: Option<(f64, f64)> = None;
        for (place, (_, spreads)) in self.places.iter().enumerate() {
            let Some(Spread { least, median, most }) = spreads[server] else { continue };
            let (mut x, at) = (middle(place), y(median));
            if self.lines {
                if let Some((x0, y0)) = before {
                    let _ =
                        writeln!(svg, "<path d='M{x0:.1} {y0:.1}L{x:.1} {at:.1}' stroke='{colour}' stroke-width='2'/>");
                }
                let _ = writeln!(svg, "<circle cx='{x:.1}' cy='{at:.1}' r='3' fill='{colour}'/>");
                svg += &text(x, at - 7.0, "middle", &number(median));
            } else {
                x += width * (server as f64 - (self.servers.len() as f64 - 1.0) / 2.0);
                let (left, height) = (x - width / 2.0, y(0.0) - at);
                let _ = writeln!(
                    svg,
                    "<rect x='{left:.1}' y='{at:.1}' width='{:.1}' height='{height:.1}' fill='{colour}'/>",
                    width - 2.0
                );
                svg += &text(x, y(most) - 4.0, "middle", &number(median));
            }
            let _ = writeln!(svg, "<path d='M{x:.1} {:.1}V{:.1}' stroke='#333'/>", y(least), y(most));
            before = Some((x, at));
        }
        svg
    }
}

fn text(x: f64, y: f64, anchor: &str, words: &str) -> String {
    format!("<text x='{x:.1}' y='{y:.1}' text-anchor='{anchor}'>{words}</text>\n")
}

/// 1, 2 or 5 times a power of ten, at least `least`.
fn nice_step(least: f64) -> f64 {
    let power = 10_f64.powf(least.max(1e-9).log10().floor());
    [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| *step >= least * 0.999).unwrap_or(power)
}
