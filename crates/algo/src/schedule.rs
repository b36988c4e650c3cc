/// Learning rate of the optimizer update with number `update`, counted from 1: it rises in a line through 0 to `base`
/// at update `warmup_updates`, and stays there.
#[must_use]
pub fn warmup(update: u64, warmup_updates: u64, base: f64) -> f64 {
    if update >= warmup_updates { base } else { base * (update as f64 / warmup_updates as f64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_in_a_line_and_stays() {
        let rates: Vec<f64> = (0..7).map(|update| warmup(update, 4, 2.0)).collect();
        assert_eq!(rates, [0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0]);
        assert_eq!(warmup(1, 0, 3.0), 3.0, "no warm-up starts at the base");
    }
}
