// Series to begin with.

// Monthly means of the CO2 in the air at Mauna Loa, January 1992 to December 2001, ppm (Scripps Institution of
// Oceanography; Keeling and Whorf).
const CO2 = `
355.9 356.7 357.9 359.1 359.5 359.1 357.0 354.9 353.0 353.4 354.2 355.4
356.7 357.2 358.4 359.3 360.2 359.5 357.4 355.3 353.8 354.1 355.4 356.8
358.3 358.9 359.9 361.2 361.6 360.9 359.5 357.4 355.9 356.0 357.6 359.1
360.0 360.9 361.6 363.4 363.7 363.2 361.8 359.4 358.0 357.9 359.5 360.7
362.0 363.2 364.1 364.7 365.3 364.9 363.5 361.3 359.4 359.6 360.7 362.4
363.1 363.9 364.6 366.3 366.7 365.5 364.4 362.5 360.1 360.8 362.4 364.2
365.3 366.2 367.4 368.5 369.1 368.8 367.6 365.7 363.9 364.3 365.5 366.9
368.1 368.9 369.6 371.0 370.8 370.2 369.0 366.7 364.7 365.1 366.6 367.9
369.0 369.4 370.4 371.5 371.6 371.6 369.9 368.0 366.5 366.7 368.1 369.4
370.2 371.3 372.1 372.8 373.8 373.1 371.3 369.4 367.9 368.0 369.4 371.0`;

// {name, text} for a model: `about` is the catalog's ForecastInfo.
export function example(about) {
  if (about.unit === "ppm" && about.step === "month") return { name: "Example: CO₂, 1992–2001", text: CO2.trim() };
  const { min_history: least = 1, max_history: most = 100, season = 1 } = about;
  const period = season > 1 ? season : 20;
  const length = Math.min(most, Math.max(least, 5 * period));
  const value = (at) => 20 + (4 * at) / length + 3 * Math.sin((2 * Math.PI * at) / period) + 0.4 * Math.sin(7.3 * at);
  const values = Array.from({ length }, (_, at) => value(at).toFixed(2));
  return { name: "Example: a made-up series", text: values.join(" ") };
}
